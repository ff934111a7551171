"""AutoIF for a target language: constraints that code can check, and answers that keep them.

The method is AutoIF's (Dong et al. 2024, arXiv 2406.13542) in the form of Typhoon-S (arXiv 2601.18129; the
authors' `data_processing`), with code run in the sandbox instead of in process.
"""
