"""What a network is trained on: images with their labels after all augmentation, on one sheet."""
