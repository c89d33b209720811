"""Evidence on real tasks: do the methods hold what their papers promise?"""
