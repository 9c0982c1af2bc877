"""The vision-language model and its parts, on stock classes wherever there is one; :mod:`.llava` joins them.

Shapes are part of the names of tensors: B rows, L tokens of a row, T tokens of all rows, D width of the language model,
E width of a tower or predictor, F inner width of an expert, N experts (or tokens of an image), K chosen experts (or keys
of attention), Q queries, H heads, C size of a head, M retained tokens, W slots of a cache, P images, V vocabulary.
"""
