"""The one error that HLM raises for bad input, and what a user can do where the system refuses."""

import errno

# Codes of OSError -> what to do.
REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some of your quota, or write elsewhere",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or write elsewhere",
    errno.EROFS: "name a folder on a disk that can be written",
    errno.EACCES: "give this user access to it, or name another path",
    errno.EPERM: "give this user access to it, or name another path",
    errno.ENOTDIR: "a part of the path is a file: correct it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
    errno.EIO: "check the disk",
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HlmError(ValueError):
    """Bad input from the user: the message says what was expected, what was found and what to do."""
