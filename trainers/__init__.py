"""Training Chinese CLIP: in two stages as the paper does, or in any other schedule of freezing and thawing.

    python -m modelscope_cnclip.trainers RECIPE.json                             # one process
    torchrun --nproc_per_node 2 -m modelscope_cnclip.trainers RECIPE.json        # two
    cnclip train RECIPE.json                                                     # the same as the first

Installed as ``modelscope_cnclip.trainers``. Start with :mod:`.recipe` (what a recipe may say), then :mod:`.trainer`
(the loop) and :mod:`.two_stage` (what is frozen, and when it thaws).
"""
