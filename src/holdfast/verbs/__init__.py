"""What a user can ask for: one file a verb, told as a short story.

`command` in each is what `holdfast <verb>` does; a verb that is more than a list has a Python function of its own name
beside it. `ending` says how a command ends.
"""
