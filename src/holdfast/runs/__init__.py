"""The pieces that verbs are told with: a run folder, a recipe checked on its model, measuring, training, export."""
