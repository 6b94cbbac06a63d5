"""Training. Installed as ``modelscope_cnclip.trainers``; empty until the two-stage trainer is here."""
