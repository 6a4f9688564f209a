"""What a user can mend, or should know."""

import logging

logger = logging.getLogger("bvl_model")


class UserError(ValueError):
    """An argument, image or file that cannot be used, or something this model was not trained for."""
