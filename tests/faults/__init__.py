"""A whole Tallygate of real processes under load, while its parts are killed, stalled and wiped.

`python -m tests.faults --seed 17 --rounds 5` runs rounds and says what they did; `check` says what
must hold afterwards.
"""
