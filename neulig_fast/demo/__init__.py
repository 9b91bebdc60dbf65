"""The demo: five small image tasks, a CLIP trained on the spot, five experts merged with NeuLig."""
