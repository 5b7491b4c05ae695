//! NBD server for hosts without vhost-user. Not there yet: see docs/NEXT.md (issue 6).
