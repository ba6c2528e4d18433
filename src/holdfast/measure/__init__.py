"""What a model can do: probes, scores, intervals, verdicts; `suites` holds the abilities."""
