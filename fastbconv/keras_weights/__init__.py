"""Weights that Keras and TensorFlow saved, for the layers of the TFP face.

    from fastbconv.keras_weights import load_keras_weights

    fb.build(model, (None, 32, 32, 3))
    print(load_keras_weights(model, "model.weights.h5"))

HDF5 needs h5py (``pip install 'fastbconv[keras]'``), SavedModels and checkpoints need tensorflow;
``python -m fastbconv keras-weights PATH --output weights.npz`` converts a file where these are
installed for a machine where they are not.
"""

from .contents import KerasWeights, KerasWeightsError, LayerWeights, MissingPackageError
from .matching import LoadedLayer, LoadReport, load_keras_weights
from .reading import read_keras_weights

__all__ = [
    "KerasWeights",
    "KerasWeightsError",
    "LayerWeights",
    "LoadReport",
    "LoadedLayer",
    "MissingPackageError",
    "load_keras_weights",
    "read_keras_weights",
]
