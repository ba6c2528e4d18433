"""Sites whose rule of composition needs a memory: one file a site. The law is the table of docs/design.md."""
