"""Submissions: a challenge folder made of finished runs, with one script that repeats them without this package.

`bundle` writes the definitions a program needs into one file, `program` is that program (train, pack, score),
`environment` reads its settings, `script` puts the file together, `folder` writes it with README, submission.json and logs.
"""
