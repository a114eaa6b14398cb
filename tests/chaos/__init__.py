"""What breaks while sessions speak, and what it may cost them: nothing but time.

A suite of real processes has one worker to spare of every stage and two gateways; a session's frames are counted and
compared, and at the end nothing may be left. `test_chaos` breaks everything once; `python -m tests.chaos` breaks at
random for as long as it is told.

    client -> gateway -> Proxy -> worker
"""
