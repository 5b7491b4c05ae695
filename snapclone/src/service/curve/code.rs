//! [`Code`]: the error codes of Curve's API. Pure.
//!
//! Invariant: numbers are Curve's; a malformed request is answered with HTTP status 400, every other failure with 500, as Curve does.

use ogee_client::MdsCallError;
use ogee_proto::MdsErrorKind;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $message:literal;)+) => {
        /// What went wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Code { $($(#[$doc])* $name),+ }

        impl Code {
            /// Curve's number.
            pub(super) const fn number(self) -> i32 {
                match self { $(Self::$name => $number),+ }
            }

            /// For people.
            pub(super) const fn message(self) -> &'static str {
                match self { $(Self::$name => $message),+ }
            }
        }
    };
}

codes! {
    /// Something failed here.
    Internal = -1, "the service or the cluster failed";
    /// A parameter is missing or malformed, or the action is unknown.
    BadRequest = -5, "a parameter is missing or malformed, or the action is unknown";
    /// It exists already.
    TaskExists = -6, "it exists already";
    /// It is another user's.
    InvalidUser = -7, "it belongs to another user";
    /// It does not exist.
    NoFile = -8, "it does not exist";
    /// The volume is not in a state for this.
    FileStatus = -9, "the volume is not in a state for this";
    /// The snapshot is another volume's.
    NameMismatch = -11, "the snapshot is of another volume";
    /// The snapshot is being made.
    DeleteUnfinished = -12, "an unfinished snapshot cannot be deleted";
    /// The snapshot is made.
    CancelFinished = -14, "a finished snapshot cannot be cancelled";
    /// The snapshot cannot be used for this.
    InvalidSnapshot = -15, "the snapshot cannot be used for this";
    /// Clones stand on the snapshot.
    InUse = -16, "clones stand on the snapshot";
    /// The task has not come to its end.
    CleanUnfinished = -17, "the task has not come to its end";
    /// The volume has as many snapshots as it may.
    SnapshotLimit = -18, "the volume has as many snapshots as it may";
    /// The destination exists.
    FileExists = -19, "the destination exists";
    /// Too much is under way.
    QueueFull = -20, "too much is under way; try again later";
    /// There is no such thing here.
    NotSupported = -21, "this is not supported";
}

impl Code {
    /// The status of the answer.
    pub(super) const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            _ => 500,
        }
    }

    /// What a refusal of the MDS means unless an action says otherwise.
    pub(super) fn of(doing: &'static str, error: &MdsCallError) -> Self {
        match error.kind {
            MdsErrorKind::NotFound => Self::NoFile,
            MdsErrorKind::AlreadyExists => Self::FileExists,
            MdsErrorKind::InvalidArgument => Self::BadRequest,
            MdsErrorKind::Attached => Self::FileStatus,
            MdsErrorKind::InUse => Self::InUse,
            MdsErrorKind::WrongOwner => Self::InvalidUser,
            MdsErrorKind::Limit => Self::QueueFull,
            MdsErrorKind::Fenced
            | MdsErrorKind::NoSpace
            | MdsErrorKind::NotLeader
            | MdsErrorKind::WrongCluster
            | MdsErrorKind::Unavailable => {
                tracing::warn!(target: "controlpath", doing, error = error as &dyn std::error::Error, "a request of Curve's API failed");
                Self::Internal
            }
        }
    }
}
