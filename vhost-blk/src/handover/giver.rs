//! The old daemon's part of a hand-over, once the new one is ready: stand still, hand everything over, let go; or go on.
//!
//! Called on the server's thread, which owns the connection. It takes some milliseconds; the bounds of each step are in `limits.rs`. Invariant: when it has
//! failed everything goes on as before; when it has succeeded this process touches neither guest memory nor the device any more.

use crate::backend::{Backend, NotStill};
use crate::connection::Connection;
use crate::handover::HandOverRefusal;
use crate::handover::doorman::{Doorman, Successor, refuse};
use crate::handover::state::Estate;
use crate::handover::wire::{Kind, WireError, receive, send};
use ogee_client::BlockDevice;
use ogee_common::clock;
use ogee_common::limits::{VHOST_UPGRADE_ACCEPT, VHOST_UPGRADE_STEP};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::PoisonError;

/// Why this daemon goes on.
#[derive(Debug, thiserror::Error)]
enum GiveError {
    /// The front end's message is being answered.
    #[error("stop answering messages")]
    NotParked,
    /// The device is being taken for the guest: an attempt that is cut short here may still be granted.
    #[error("leave the device: it is being attached")]
    Attaching,
    /// See the kind.
    #[error("stop the rings: {0:?}")]
    NotStill(NotStill),
    /// No file descriptors.
    #[error("collect the state of the rings")]
    State(#[source] vhost::vhost_user::Error),
    /// The same.
    #[error("duplicate descriptors")]
    Io(#[source] io::Error),
    /// The new daemon is gone, late, or has refused by ending.
    #[error("speak with the new daemon")]
    Wire(#[source] WireError),
    /// It said something else.
    #[error("the new daemon said something out of place")]
    OutOfPlace,
}

impl GiveError {
    const fn refusal(&self) -> HandOverRefusal {
        match self {
            Self::NotParked => HandOverRefusal::FrontEndBusy,
            Self::NotStill(NotStill::InFlight) => HandOverRefusal::InFlight,
            Self::Attaching => HandOverRefusal::Attaching,
            _ => HandOverRefusal::Failed,
        }
    }
}

/// Tries to hand everything over to `successor`; whether this daemon has to end.
pub(crate) fn give<D: BlockDevice>(
    doorman: &Doorman,
    successor: &Successor<'_>,
    listener: &UnixListener,
    device: &D,
    connection: Option<&Connection<D>>,
) -> bool {
    let began = clock::now();
    let given = match connection {
        Some(connection) => stand_still(connection, device).and_then(|()| offer(doorman, successor, listener, Some(connection))),
        None => offer::<D>(doorman, successor, listener, None),
    };
    if let Err(error) = given {
        tracing::warn!(target: "controlpath", %error, source = ?std::error::Error::source(&error), stood = ?began.elapsed(),
            "no hand-over: this daemon goes on");
        // A protocol thread that is not parked may be stopping a ring, which is none of ours then.
        if let Some(connection) = connection.filter(|_| !matches!(error, GiveError::NotParked)) {
            connection.backend.thaw();
            connection.parking.release();
        }
        refuse(&successor.stream, error.refusal());
        return false;
    }
    if let Some(connection) = connection {
        let_go(&connection.backend);
        connection.parking.leave();
    }
    device.leave();
    match send(&successor.stream, Kind::Go, (&[], &[]), VHOST_UPGRADE_ACCEPT) {
        Ok(()) => tracing::info!(target: "controlpath", stood = ?began.elapsed(), "handed over to another daemon"),
        Err(error) => tracing::error!(target: "controlpath", %error,
            "the new daemon ended as it took over: the hypervisor has to connect to the next one"),
    }
    true
}

fn stand_still<D: BlockDevice>(connection: &Connection<D>, device: &D) -> Result<(), GiveError> {
    if !connection.parking.park(VHOST_UPGRADE_STEP) {
        return Err(GiveError::NotParked);
    }
    connection.backend.freeze().map_err(GiveError::NotStill)?;
    // No ring starts any more, so nobody asks for the device from here on.
    if device.may_leave() { Ok(()) } else { Err(GiveError::Attaching) }
}

/// Sends everything, and waits until the new daemon has accepted it.
fn offer<D: BlockDevice>(
    doorman: &Doorman,
    successor: &Successor<'_>,
    listener: &UnixListener,
    connection: Option<&Connection<D>>,
) -> Result<(), GiveError> {
    let front_end = match connection {
        Some(connection) => {
            let handler = connection.handler.lock().unwrap_or_else(PoisonError::into_inner);
            let mut state = handler.state().map_err(GiveError::State)?;
            state.channel = connection.channel.duplicate().map_err(GiveError::Io)?;
            Some((connection.stream.try_clone().map_err(GiveError::Io)?, state))
        }
        None => None,
    };
    let estate = Estate {
        listener: listener.try_clone().map_err(GiveError::Io)?,
        upgrades: doorman.listener.try_clone().map_err(GiveError::Io)?,
        claim: doorman.terms.claim.as_ref().map(|claim| claim.try_clone()).transpose().map_err(GiveError::Io)?,
        front_end,
    };
    let encoded = estate.encode();
    send(&successor.stream, Kind::Estate, (&encoded.bytes, &encoded.files), VHOST_UPGRADE_ACCEPT).map_err(GiveError::Wire)?;
    let answer = receive(&successor.stream, VHOST_UPGRADE_ACCEPT).map_err(GiveError::Wire)?;
    if answer.kind == Some(Kind::Accepted) { Ok(()) } else { Err(GiveError::OutOfPlace) }
}

/// Drops what is in flight and ends the loops: the new daemon runs it again.
fn let_go<D: BlockDevice>(backend: &Backend<D>) {
    backend.close_and_give_up();
    // The loops poll; they end as soon as they are told to drop everything.
    while !backend.wait_idle(VHOST_UPGRADE_STEP) {}
}
