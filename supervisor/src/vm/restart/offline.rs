//! What can be said of the graph without a block-proc: the next one is built from the description, so a request that only
//! makes the nodes what the description says has succeeded already.

use ipc::graph::{GraphReply, GraphRequest};
use std::collections::BTreeMap;

/// The answer to a request that needs no block-proc; nothing for one that does.
///
/// Whether a block-proc that ended before it answered has done what it was asked makes no difference: it lets no request of
/// the guest begin on a changed graph before its answer is on its way.
pub fn answer(request: &GraphRequest) -> Option<GraphReply> {
    match request {
        GraphRequest::Change(_) => Some(GraphReply::Resized(BTreeMap::new())),
        GraphRequest::Switch(switch)
            if switch.settle.is_empty() && switch.bitmaps.is_empty() && switch.start.is_empty() =>
        {
            Some(GraphReply::Resized(BTreeMap::new()))
        }
        GraphRequest::Remove(_)
        | GraphRequest::ControlJob { .. }
        | GraphRequest::ReplaceFile { .. }
        | GraphRequest::DetectZeroes { .. }
        | GraphRequest::RemoveExport { .. }
        | GraphRequest::SetGroup { .. }
        | GraphRequest::RemoveGroup(_)
        | GraphRequest::ThrottleDevice { .. } => Some(GraphReply::Done),
        // What was known last stays.
        GraphRequest::Report(_) => Some(GraphReply::Reports(BTreeMap::new())),
        GraphRequest::ReportJobs => Some(GraphReply::Jobs(BTreeMap::new())),
        GraphRequest::ReportBitmaps => Some(GraphReply::Bitmaps(BTreeMap::new())),
        GraphRequest::Switch(_)
        | GraphRequest::Add { .. }
        | GraphRequest::Attach { .. }
        | GraphRequest::HashBitmap(_)
        | GraphRequest::StoreBitmaps
        | GraphRequest::AddExport(_)
        | GraphRequest::Reconnect { .. }
        | GraphRequest::Create { .. }
        | GraphRequest::Resize { .. }
        | GraphRequest::CreateSnapshot { .. }
        | GraphRequest::DeleteSnapshot { .. }
        | GraphRequest::SetBackingName { .. }
        | GraphRequest::SetWriteThreshold { .. }
        | GraphRequest::SetHistogram { .. }
        | GraphRequest::Io { .. }
        | GraphRequest::Breakpoint { .. } => None,
    }
}
