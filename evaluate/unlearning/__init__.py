"""Unlearning: features of one domain are clamped, and what that costs the domain and everything else is measured.

`domains` says which documents, `select` which features, `clamp` what is done to them, `replay` what the
model makes of it, `score` what comes of it; `questions`, `prompts` and `choice` are the multiple-choice
protocol.
"""
