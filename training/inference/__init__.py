"""From runs to a submission: ensembles, all that is fitted out of fold, prediction, explanation and export."""
