"""The formats of annotations, one module each; its ``read`` is a :data:`mmpipe.data.formats.base.FormatReader`."""
