"""Admission, the part that more than one process needs: the form in which a plan is handed to
`lua/admit.lua` (`program`) and the way a subject's state is rebuilt from the ledger (`baseline`).
May import `core` only.
"""
