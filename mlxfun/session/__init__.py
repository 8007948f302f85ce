"""One resident model with everything that belongs to it: what front ends and library users open."""
