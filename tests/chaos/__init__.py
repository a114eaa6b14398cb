"""Chaos tests: processes fail while sessions speak, which may cost the sessions nothing but time.

A suite of real processes has one spare worker of every stage and two gateways. The frames of sessions are counted and
compared, and at the end no stream, key or process may remain. `test_chaos` causes every fault once; `python -m
tests.chaos` causes faults at random for a given time.

    client -> gateway -> Proxy -> worker
"""
