"""The one exception that is the reader's to mend.

UserError            every fault found, one line each; printed without a traceback, exit code 2
"""


class UserError(Exception):
    """Something the person at the keyboard can mend.

    Each fault is one line: which flag or file:line, what was found, what to do. All faults of a stage are gathered
    and raised together, so that nobody has to mend them one run at a time.
    """

    def __init__(self, *faults: str):
        if not faults:
            raise ValueError("a UserError names at least one fault")
        self.faults = faults
        super().__init__("\n".join(faults))
