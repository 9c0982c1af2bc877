"""What models are trained for: pure functions of tensors.

Shapes are part of the names: B batch, L length, D and E widths of student and teacher, V and U their
vocabularies, R rows (the positions that count), K entries a row, C rows of one chunk, T tokens, N experts.
"""
