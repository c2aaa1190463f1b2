//! Simulation and system tests.
