"""Training and evaluation of predictors, with torch: what ``starmesh predictor train`` and ``evaluate`` run."""
