"""What a user can mend."""


class UserError(ValueError):
    """An argument, image or file that cannot be used, or something this model was not trained for."""
