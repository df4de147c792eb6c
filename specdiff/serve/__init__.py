"""`specdiff serve`: pictures over HTTP, many generations advanced together.

    app         FastAPI: what clients may ask, how errors are answered, the page, /metrics
    drawing     the events of several pictures as one stream, from a backend, which is one of
    engine        threads, queue and counts of one process
    deployment    replicas of the engine on a Ray cluster

    engine      a thread for each generation runs its own unedited pipeline, around a
    stand       stand-in for the denoiser, whose calls wait for the next
    rounds      round: one thread takes the calls that wait, and makes what is
    joining     of equal shape one call of the model

    start       from what is wished to an engine; its model may be compiled into
    programs      a folder, from which later ones start faster

FastAPI, uvicorn, prometheus-client and Ray are imported here alone: pip install "specdiff[serve]".
"""
