"""The one training loop, prediction, and checkpoints. They know the models' contract and no model."""
