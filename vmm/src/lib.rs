//! The virtual machine monitor and its replication.
