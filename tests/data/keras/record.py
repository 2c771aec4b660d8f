"""Records the files beside it with the real libraries; see README.md.

    python record.py FOLDER            # tensorflow 2.18 with tf-keras, or tensorflow 2.12
    python record.py FOLDER --keras3   # Keras 3, which has no variational layers

Values depend on the names of layer and variable alone, so that all versions write the same.
"""

import gzip
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("TF_USE_LEGACY_KERAS", "0" if "--keras3" in sys.argv else "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import tensorflow as tf

OUT = Path(sys.argv[1])
VERSION = ".".join(tf.__version__.split(".")[:2])


def fill(model, prefix=""):
    """Sets every layer to values of its name; returns them as layer/variable -> array."""
    values = {}
    for layer in model.layers:
        name = prefix + layer.name
        if hasattr(layer, "layers"):
            values.update(fill(layer, f"{name}/"))
            continue
        arrays = []
        for weight in layer.weights:
            key = f"{name}/{weight.name.split('/')[-1].split(':')[0]}"
            rng = np.random.default_rng(zlib.crc32(key.encode()))
            values[key] = rng.standard_normal(tuple(weight.shape)).astype("float32")
            arrays.append(values[key])
        layer.set_weights(arrays)
    return values


def dump_checkpoint(prefix, name):
    """What TensorFlow's reader of checkpoints gives, as an .npz."""
    reader = tf.train.load_checkpoint(prefix)
    values = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    graph = values.pop("_CHECKPOINTABLE_OBJECT_GRAPH", None)
    if graph is not None:
        values["_CHECKPOINTABLE_OBJECT_GRAPH"] = np.frombuffer(graph, np.uint8)
    np.savez_compressed(OUT / name, **values)


def variational_models():
    """name -> model."""
    import tensorflow_probability as tfp

    keras, layers, random = tf.keras, tfp.layers, tfp.layers.default_mean_field_normal_fn
    everything = {
        "bias_posterior_fn": random(),
        "bias_prior_fn": random(),
        "kernel_prior_fn": random(),
    }

    def frozen_prior(dtype, shape, name, trainable, add_variable_fn):
        return random()(dtype, shape, name, False, add_variable_fn)

    line, image = keras.Input((5, 2), name="line"), keras.Input((5, 5, 2), name="image")
    volume = keras.Input((3, 3, 3, 1), name="volume")
    parts = [
        layers.Convolution1DReparameterization(3, 2, name="zeta")(line),
        layers.Convolution1DFlipout(2, 3)(line),
        layers.Convolution2DReparameterization(2, 2, name="alpha", **everything)(image),
        layers.Convolution2DReparameterization(3, 2)(image),
        layers.Convolution2DFlipout(2, 2, bias_posterior_fn=None)(image),
        layers.Convolution3DReparameterization(2, 2)(volume),
        layers.Convolution3DFlipout(1, 2, name="last")(volume),
    ]
    flat = [keras.layers.Flatten()(part) for part in parts]
    heads = [
        layers.DenseLocalReparameterization(2)(flat[0]),
        layers.DenseFlipout(2, **everything)(flat[1]),
        layers.DenseReparameterization(2, kernel_prior_fn=frozen_prior)(flat[2]),
        layers.DenseReparameterization(1)(keras.layers.Concatenate()(flat[3:])),
    ]
    siblings = keras.Model([line, image, volume], heads, name="siblings")

    inner = keras.Sequential(
        [layers.DenseReparameterization(4), layers.DenseReparameterization(3, name="hidden")],
        name="inner",
    )
    cnn = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Convolution2DReparameterization(
                3, 3, name="features", kernel_prior_fn=frozen_prior
            ),
            keras.layers.BatchNormalization(name="norm"),
            layers.Convolution2DReparameterization(3, 3, name="more"),
            keras.layers.Flatten(),
            inner,
            keras.layers.Dense(4, name="plain"),
            layers.DenseReparameterization(2),
        ],
        name="cnn",
    )

    class Sub(keras.Model):
        def __init__(self):
            super().__init__(name="sub")
            self.conv1 = layers.Convolution2DReparameterization(2, 3)
            self.flat = keras.layers.Flatten()
            self.output_layer = layers.DenseReparameterization(2, name="out")
            self.blocks = [layers.DenseFlipout(2), layers.DenseFlipout(2)]

        def call(self, x):
            x = self.flat(self.conv1(x))
            for block in self.blocks:
                x = block(x)
            return self.output_layer(x)

    sub = Sub()
    sub(np.zeros((1, 4, 4, 1), "float32"))
    return {"siblings": siblings, "cnn": cnn, "sub": sub}


def without_byte_code():
    """Configurations hold the functions' byte code, with the paths of the recording machine."""
    from tensorflow_probability.python.layers import util

    serialize = util.serialize_function

    def serialize_function(function):
        value, kind = serialize(function)
        return (("", None, None) if kind == "lambda" else value), kind

    util.serialize_function = serialize_function


def record_variational(work):
    without_byte_code()
    for name, model in variational_models().items():
        values = fill(model)
        if VERSION == "2.12":
            model.save_weights(OUT / f"{name}-tf2.12.weights.h5")
            if name == "cnn":
                model.save(OUT / f"{name}-tf2.12.keras")  # HDF5 under that name
            continue
        np.savez_compressed(OUT / f"{name}.npz", **values)
        model.save_weights(OUT / f"{name}.h5")
        model.save_weights(OUT / f"{name}.weights.h5")
        if name == "cnn":
            model.compile("sgd", "mse")
            model.train_on_batch(np.zeros((2, 6, 6, 2), "f"), np.zeros((2, 2), "f"))
            fill(model)
            model.save(OUT / f"{name}-whole.h5")
        if name != "siblings":
            model.save(OUT / f"{name}.keras")
        model.save(work / name, save_format="tf")
        dump_checkpoint(str(work / name / "variables" / "variables"), f"{name}-savedmodel.npz")
        saved = tf.train.Checkpoint(model=model).save(str(work / f"{name}.ckpt"))
        dump_checkpoint(saved, f"{name}-checkpoint.npz")
    if VERSION != "2.12":
        record_names(work)


def record_names(work):
    """A checkpoint of names, with an optimiser's variables, from a graph."""
    import tensorflow_probability as tfp

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.ones((2, 5, 5, 1))
        x = tfp.layers.Convolution2DReparameterization(2, 2, name="features")(x)
        layer = tfp.layers.DenseReparameterization(2)
        y = layer(tf.reshape(x, (2, 32)))
        step = tf.compat.v1.train.AdamOptimizer().minimize(tf.reduce_sum(y))
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(step)
        saved = tf.compat.v1.train.Saver().save(session, str(work / "names.ckpt"))
    dump_checkpoint(saved, "names-checkpoint.npz")


def record_keras3():
    import keras

    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Conv2D(2, 2, name="features"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5, seed=1),
            keras.Sequential([keras.layers.Dense(2, name="hidden")], name="inner"),
            keras.layers.Dense(2),
        ]
    )
    values = fill(model)
    np.savez_compressed(OUT / "keras3.npz", **values)
    model.save_weights(OUT / "keras3.weights.h5")
    model.save(OUT / "keras3.keras")
    model.save(OUT / "keras3-whole.h5")


def compress():
    """An HDF5 file of small arrays is mostly gaps."""
    for path in [*OUT.glob("*.h5"), *OUT.glob("*.keras")]:
        content = gzip.compress(path.read_bytes(), 9, mtime=0)
        path.with_name(f"{path.name}.gz").write_bytes(content)
        path.unlink()


if __name__ == "__main__":
    temporary = Path(tempfile.mkdtemp())
    try:
        record_keras3() if "--keras3" in sys.argv else record_variational(temporary)
        compress()
    finally:
        shutil.rmtree(temporary)
