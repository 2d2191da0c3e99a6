"""Why a disk or a server failed, in words, and whether waiting may help: of OSError, and of obstore's exceptions.

obstore's messages are Rust's: an HTTP answer with its XML, and a dump of structures. All there is to know is in them.
"""

import errno
import os
import re

from distill.errors import first_line, hide_in

_TRANSIENT = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EINTR, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN, errno.ESHUTDOWN, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip
_LATER = {408, 425, 429}  # HTTP; so is every status from 500 up
_LATER_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted"}
_CAUSES = {
    "BadScheme": "it is a http endpoint, and client_options.allow_http is false",
    "InvalidMessage": "the endpoint does not speak https",
    "InvalidCertificate": "its certificate is not trusted",
    "dns error": "the name of its host is not known",
    "Connection refused": "connection refused",
    "following redirect": "its redirects do not end",
    "Content-Range header": "it does not say which part of a file it sends (Content-Range)",
    "CONTENT_RANGE header": "it does not say which part of a file it sends (Content-Range)",
    "Content-Length Header missing": "it does not say how long a file is (Content-Length)",
    "TimedOut": "no answer in time",
    "Timeout": "no answer in time",
    "error sending request": "the connection was lost",  # for any other reason
}
_LASTING_CAUSES = ("BadScheme", "InvalidMessage", "InvalidCertificate", "following redirect")
_ANSWERS = {"AlreadyExistsError", "PreconditionError", "NotModifiedError", "NotSupportedError"}


def is_about_storage(error: Exception) -> bool:
    """Whether `error` says that a disk or a server fails; not where it is an answer, such as "not found".

    Nor where a file is shorter than what is asked of it: it is damaged.
    """
    if getattr(error, "errno", None) == errno.EINVAL or re.search("status code: 416|Wanted range", str(error)):
        return False
    if isinstance(error, FileNotFoundError):  # a bucket that is not there is no answer to a question about an object
        return "<Code>NoSuchBucket</Code>" in str(error)
    return isinstance(error, OSError) or (_is_obstores(error) and type(error).__name__ not in _ANSWERS)


def is_transient(error: Exception) -> bool:
    """Whether it may go away by itself."""
    if not _is_obstores(error):
        return isinstance(error, TimeoutError) or getattr(error, "errno", None) in _TRANSIENT
    text = str(error)
    if (number := _status(text)) is not None:
        return number in _LATER or number >= 500 or _tag(text, "Code") in _LATER_CODES
    if found := re.search(r"os error (\d+)", text.partition("Debug source")[0]):
        return int(found[1]) in _TRANSIENT
    lost = re.search("(?<!Generic )HTTP error", text) is not None  # not the name of the store of web servers
    return lost and not any(cause in text for cause in _LASTING_CAUSES)


def in_words(error: Exception) -> str:
    """Why it failed, in one line, without addresses or keys; these are hidden in `error` itself too."""
    hide_in(error)
    if not _is_obstores(error) and not isinstance(error, FileNotFoundError):
        return (isinstance(error, OSError) and error.strerror) or (
            "no answer in time" if isinstance(error, TimeoutError) else first_line(error)
        )
    text = str(error)
    if "169.254.169.254" in text or "169.254.170" in text:  # where a cloud's machine would get credentials
        return "no credentials were found"
    if (number := _status(text)) is not None:
        code, message = _tag(text, "Code"), _tag(text, "Message")
        status = re.sub(r":.*", "", text.partition("status code: ")[2].splitlines()[0]).strip()
        refused = "access denied; are the credentials right?" if number in (401, 403) else "it answered"
        return f"{message.rstrip('.')} ({code})" if message else f"{refused} ({code or status})"
    if found := re.search(r"os error (\d+)", text.partition("Debug source")[0]):
        return os.strerror(int(found[1]))
    for sign, words in _CAUSES.items():
        if sign in text:
            return words
    return re.sub(r"\S+://\S+", "the endpoint", first_line(error))


def _is_obstores(error: Exception) -> bool:
    return type(error).__module__.startswith("obstore")


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    return int(found[1]) if found else None


def _tag(text: str, name: str) -> str:
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return " ".join(found[1].split()) if found else ""
