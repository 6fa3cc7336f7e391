from hypothesis import settings

# A busy machine must not fail a test of numbers.
settings.register_profile("kernels", deadline=None)
settings.load_profile("kernels")
