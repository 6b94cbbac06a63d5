"""Data only: tower shapes, the vocabulary, configuration files. Installed as ``modelscope_cnclip.configuration``."""
