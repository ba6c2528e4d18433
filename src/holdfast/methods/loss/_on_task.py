"""Holding the model near the base on the task's own answers: what cannot stand beside that."""

REFUSES = {
    "ProMoT": "ProMoT reads the task with a soft prompt, which the base it would be compared with lacks.",
    "SDFT": "SDFT does not run the task's own answers, on which the base would hold the model.",
}
