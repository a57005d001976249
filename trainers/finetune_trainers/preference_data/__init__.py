"""Preference data: people's judgements brought in, an AI judge asked, and the answers that are judged written.

    __main__     one request a process; `finetune data` starts it
    reading      rows of a source with their places, and what is in them
    opinions     ratings, rankings and pairs -> rows that methods learn from; pure
    importing    people's judgements -> a data set
    questions    what a judge is asked, and what it has said; pure
    asking       the judge, over HTTP, and the verdicts on disk
    judging      two answers, two verdicts -> a data set
    candidates   several answers to each prompt, sampled or by beam search
    writing      a data set, and beside it what it was made of

Only `candidates` imports torch.
"""
