{{- define "koopmon.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-koopmon" .Release.Name) (contains "koopmon" .Release.Name) }}
{{- $name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "koopmon.selector" -}}
app.kubernetes.io/name: koopmon
app.kubernetes.io/component: monitor
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "koopmon.labels" -}}
{{ include "koopmon.selector" . }}
app.kubernetes.io/part-of: koopmon
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "koopmon.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "koopmon.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
