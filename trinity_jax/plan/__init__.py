"""--mode=plan: the run's own programs, compiled for devices that are not there, and what they cost.

topologies.py  the devices and their published figures
lowering.py    the train step, prefill, decode and publish of a config, from shapes alone
hlo.py         a compiled program's text as instructions
costs.py       FLOPs, bytes of memory and of collectives in it, loops times their trips
report.py      memory, time and what to change, as a table
"""
