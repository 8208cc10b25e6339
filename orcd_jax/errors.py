"""The exceptions of orcd_jax: one small tree, each message one line that says what is wrong and what to do."""


class OrcdJaxError(Exception):
    """Base of every error that orcd_jax raises on purpose."""


class GGUFError(OrcdJaxError):
    """A GGUF file is malformed, contradicts itself, or holds what this project does not support."""


class TemplateError(OrcdJaxError):
    """A chat template is missing, broken, or went over its limits."""


class RequestError(OrcdJaxError, ValueError):
    """A request cannot be served as asked: a prompt, an option, or a combination of them is wrong."""


class CapacityError(OrcdJaxError):
    """Weights, cache or workspace do not fit the device's memory."""


class DownloadError(OrcdJaxError):
    """A model file could not be fetched or verified."""


class NonFiniteError(OrcdJaxError):
    """The model computed logits that are not finite."""
