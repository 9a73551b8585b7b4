"""The rehearsal server: one model behind NDIF's wire protocol, on one's own machine.

A script that is to run on NDIF can fail there in ways in which it cannot fail at home: code that is
not installed there, values that do not travel, a connection that drops, another version. This
server is where such a script fails first. A stock nnsight client talks to it as it talks to NDIF:

    python interp/rehearsal/__main__.py MODEL --port 5001        (or: interp serve MODEL)

    with model.trace(inputs, remote="http://127.0.0.1:5001"): ...

It is a program of its own, not a part of the library: it is started by its path, it never imports
`interp`, and it sees to it that nothing it runs can (`__main__`). Two processes make it up:

* the *server* speaks HTTP and websockets (`app`), reads bodies within bounds (`bodies`), keeps what
  each job came to (`board`), the sessions that want to be told of it (`sessions`), and the queue
  (`runner`). It never loads torch and never unpickles anything;
* the *worker* (`worker`) holds the model (`loading`), runs one job at a time (`execution`) and then
  puts the model back as it was (`pristine`). It can be killed at any moment, and is when a job
  takes too long; the server then starts another and goes on with the queue.

They exchange messages of JSON and bytes over a socket pair (`link`). `faults` makes the server
misbehave on purpose, for tests of clients.

**It runs what it is sent.** Whoever has the key can do on this machine whatever its user can. Hence
it listens on this machine only, demands the key, and is meant for one's own scripts, not as a
service. The worker is a separate process so that a job's accident does not end the server; it is no
sandbox against a job that means harm.
"""
