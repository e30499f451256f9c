"""How much random testing: every test run tries some cases, `make soak` tries many more."""

from hypothesis import settings

# No deadlines: a busy machine is not a fault. The blob is what repeats a failing case.
settings.register_profile("everyday", deadline=None, print_blob=True)
settings.register_profile("soak", settings.get_profile("everyday"), max_examples=5000)
settings.load_profile("everyday")
