"""How many tokens a running sequence still has to generate, from the model's own hidden state.

Owns what the predictor service, the training command and the simulator share: batches of samples, what predicts from
them, predictors as files, collected samples on disk, recalibration. Owns no wire, no thread and no clock. Needs numpy
only; ``training`` beneath it needs torch.
"""
