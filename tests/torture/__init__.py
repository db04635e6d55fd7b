"""Bad inputs, kills, full disks and doubled starts, by the hundred, over every command: `make torture`.

A case runs the command line in a child forked from a process that has imported everything, so that a thousand cases
take minutes. `judge` says what no case may do; `world` makes the tiny models, data and runs that cases spoil.
"""
