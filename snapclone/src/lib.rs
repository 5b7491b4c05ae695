//! Backup, clone and restore service on S3. Not there yet: see docs/NEXT.md (issue 5).
