"""What the laboratory says when it cannot go on. The command line prints these as one line, without a traceback."""


class LabError(Exception):
    """Bad input. The message is one line: what was given, what was expected, what to do."""


class RecordError(LabError):
    """A record that cannot be read or written: a full disk, no permission, a folder that holds another run."""


class RankError(LabError):
    """Another process of a run that several train together has failed, has died, or does not answer."""


class Interrupted(Exception):
    """A run was asked to stop; its checkpoint is written and the same command goes on from there."""
