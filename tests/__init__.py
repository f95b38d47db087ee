"""Tests, laid out as the packages of samtune are; what they share is in tests/support.

Lanes: without -m, all that is fast (identities, closed forms, small runs); -m fault breaks runs and looks what is left;
-m slow writes mistakes into the code, runs real data and long sweeps; -m browser opens pages in Chromium; -m fakecuda
looks at what a step asks of a GPU, without one. Benchmarks (python -m tests.benchmarks.NAME) measure speed; no test
does. tests/gpu.sh runs what needs a GPU.
"""
