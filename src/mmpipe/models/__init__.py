"""The vision-language model and its parts, on stock classes wherever there is one."""
