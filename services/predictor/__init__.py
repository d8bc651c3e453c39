"""The predictor service: how many tokens each running request still has to generate."""
