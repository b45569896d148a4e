"""From tensors to a submission: configuration, model, training loop, evaluation, prediction, report."""
